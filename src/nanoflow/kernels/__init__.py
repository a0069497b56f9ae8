"""The operations' kernels: one signature an operation, several backends, and the choice of one by what works here."""
