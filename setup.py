from setuptools import find_packages, setup

setup(
    name="sam-bdd100k",
    version="0.1.0",
    description="Fine-tune Segment Anything's mask decoder into a driving-scene segmenter on BDD100K",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["segment_anything*", "utils*"]),
    install_requires=[
        "torch>=2.4",
        "numpy",
        "opencv-python-headless",
        "pillow",
        "monai",
        "safetensors",
        "torchvision",  # what --augment full does to images
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "log": ["tensorboard", "wandb"],
        "test": [
            "pytest",
            "ruff",
            "mypy",
            "tensorboard",
            "wandb",
            "hypothesis",  # damaged and hostile files by the thousand: tests/fuzz.py
            # Oracles: what the tests compare with.
            "segment-anything==1.0",
            "pycocotools",
            "torchmetrics",
            "bdd100k==1.0.1",
        ],
    },
)
