"""What `dsr1 doctor` looks at: one small function a check, a file a subject. Only that of the bandwidth needs torch."""
