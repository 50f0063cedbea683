"""Stable Diffusion XL by Hugging Face's diffusers; the extra `diffusers` installs what it needs."""
