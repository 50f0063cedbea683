"""`sketch`: a deterministic painter for machines without a GPU. It is no diffusion model."""
