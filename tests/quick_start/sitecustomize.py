"""Hide optional packages from processes that tests start, which halves their start.

monai imports every optional package that it finds. The tests' dependencies install many.
"""

import sys

for name in ("torchvision", "ignite", "transformers", "itk", "nibabel", "skimage", "scipy", "pandas", "onnx", "mlflow"):
    sys.modules[name] = None  # type: ignore[assignment]
