"""How a network is trained: set-up, the step, the loop around it, and the engines below it."""
