"""Names that files of weights have in repositories and directories."""

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
CONFIG = "config.json"
DIFFUSERS = "diffusion_pytorch_model"
# File names that a directory may hold, in order of preference.
HUB_FILES = tuple(
    f"{name}{index}"
    for name in (SAFETENSORS, TORCH, f"{DIFFUSERS}.safetensors", f"{DIFFUSERS}.bin")
    for index in ("", ".index.json")
)
