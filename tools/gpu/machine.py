"""Print the machine: the card, shared memory, cores, the compiler, versions. `python -m tools.gpu.machine`"""

import importlib.metadata
import os
import platform
import shutil
import subprocess

COMMANDS = ("nvidia-smi -L",
            "nvidia-smi --query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu "
            "--format=csv", "gcc --version", "df -h /dev/shm", "free -g")
PACKAGES = ("torch", "triton", "numpy", "pillow", "pytest", "timm", "torchvision", "transformers", "lightly")


def main():
    for command in COMMANDS:
        words = command.split()
        print(f"$ {command}", flush=True)
        if shutil.which(words[0]) is None:
            print("not found")
        else:
            subprocess.run(words)
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.platform()}")
    found = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    print(", ".join(f"{name} {found.get(name, 'not installed')}" for name in PACKAGES))

    import torch
    if not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} finds no GPU")
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}: {properties.total_memory / 1e9:.1f} GB, {properties.multi_processor_count} "
          f"multiprocessors, compute capability {properties.major}.{properties.minor}; CUDA "
          f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")


if __name__ == "__main__":
    main()
