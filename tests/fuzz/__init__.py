"""Inputs that nobody thought of; `make fuzz`, and a short fixed part of it among the tests."""
