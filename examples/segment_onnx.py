"""Segment a picture with an exported semantic model; needs only numpy, Pillow and onnxruntime.

    python -m utils.export --format onnx --output bdd100k.onnx ...    # in this project, once
    python examples/segment_onnx.py bdd100k.onnx picture.jpg map.png  # anywhere

Writes the classes as colours, at the picture's size, and prints each class's share of the picture.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

PAD_COLOR = (124, 116, 104)  # SAM's mean


def main(model: str, picture: str, output: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    height, width = (int(side) for side in (about["image_size"].split("x") * 2)[:2])
    names, colors = json.loads(about["class_names"]), json.loads(about["class_colors"])

    # The frame: the picture stretched to it, or scaled to fit and padded below or to the right.
    image = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
    scale = min(width / image.width, height / image.height)
    size = (width, height)
    if about["resize_mode"] == "pad":
        size = (max(1, int(image.width * scale + 0.5)), max(1, int(image.height * scale + 0.5)))
    shrinks = size[0] <= image.width and size[1] <= image.height
    frame = Image.new("RGB", (width, height), PAD_COLOR)
    frame.paste(image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR))

    batch = np.asarray(frame)[None]  # 1 x H x W x 3
    if about["image_layout"] == "nchw":
        batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    if about["image_dtype"] == "float32":
        batch = batch.astype(np.float32) / 255
    (class_map,) = session.run(["class_map"], {"images": batch})[0]  # H x W train ids
    class_map = class_map[: size[1], : size[0]]  # without the padding

    for index, share in enumerate(np.bincount(class_map.ravel(), minlength=len(names)) / class_map.size):
        if share >= 0.001:
            print(f"{names[index]:<14} {share:6.1%}")
    colored = Image.fromarray(class_map).resize(image.size, Image.Resampling.NEAREST)
    colored.putpalette(np.array(colors, np.uint8).tobytes())
    colored.save(output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python segment_onnx.py MODEL.onnx PICTURE MAP.png")
    main(*sys.argv[1:])
