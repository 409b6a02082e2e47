"""What `dsr1 doctor` looks at: one small function a check, a file a subject. All of them do without torch and Numba."""
