"""The commands of ``njepa``, a file each; ``main(argv, prog)`` returns the exit status."""
