"""What a container runs: configuration by NIM's variables, profiles, engines on first use, Triton and its front end."""
