"""Trainings that something happens to: killed, on bad disks."""
