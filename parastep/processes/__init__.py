"""Other processes, whatever the host: frames between them, NCCL, and starting one."""
