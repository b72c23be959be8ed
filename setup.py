from setuptools import find_packages, setup
from setuptools.command.install import install


class InstallBeside(install):
    """Puts the packages into a folder of their own at the end of Python's path: the public segment-anything installs a
    `segment_anything` too, and pip would put the files of one over those of the other."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.extra_path = "sam_bdd100k"  # a folder, and a .pth file of that name


setup(
    name="sam-bdd100k",
    version="0.1.0",
    description="Fine-tune Segment Anything's mask decoder into a driving-scene segmenter on BDD100K",
    license="MIT",
    python_requires=">=3.10",
    cmdclass={"install": InstallBeside},
    packages=find_packages(include=["segment_anything*", "utils*"]),
    install_requires=[
        "torch>=2.10",  # CVE-2025-32434, CVE-2026-24747: files that harm though weights_only=True
        "numpy",
        "opencv-python-headless>=4.12",  # CVE-2025-53644: of a JPEG
        "pillow>=12",
        "monai",
        "safetensors",
        "torchvision",  # what --augment full does to images
        "tqdm",
        "matplotlib",
        "filelock>=3.30",  # whose FileLock can do without a soft lock
    ],
    extras_require={
        "log": ["tensorboard", "wandb"],
        "test": [
            "pytest",
            "ruff",
            "mypy",
            "tensorboard",
            "wandb",
            "hypothesis",  # damaged and hostile files by the thousand: tests/helpers/fuzz.py
            # Oracles: what the tests compare with. The public segment-anything is in a folder of its own (Makefile).
            "pycocotools",
            "torchmetrics",
            "bdd100k==1.0.1",
        ],
    },
)
