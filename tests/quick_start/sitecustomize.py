"""On the path of processes that tests start: they need half the time without what came with the tests' oracles.

monai imports whatever it finds installed, torchvision above all, to find out what it could do with it.
"""

import sys

for name in ("torchvision", "ignite", "transformers", "itk", "nibabel", "skimage", "scipy", "pandas", "onnx", "mlflow"):
    sys.modules[name] = None  # type: ignore[assignment]
