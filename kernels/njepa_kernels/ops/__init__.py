"""The ops, a package each: op, reference, triton_kernel, native, cases."""
