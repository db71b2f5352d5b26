"""Calibration images: a folder of them, as the model's own image processor gives them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxslim.errors import CalibrationError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MOST_PIXELS = 50 * 10**6  # of an image: its header alone says how much memory it takes
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def find_images(folder: Path) -> list[Path]:
    """The images in a folder and below it, in the order of their names.

    Raises `CalibrationError` if there is none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        names = [path.relative_to(folder).as_posix() for path in files[:6]]
        raise CalibrationError(
            "the folder has no images",
            path=str(folder),
            seen=", ".join(names) or "nothing",
            expected=", ".join(SUFFIXES),
            mend="pass a folder of images; or the file itself, if it is text or arrays",
        )
    return found


def pixel_reader(folder: Path, channels: int) -> Callable[[Sequence[Path]], np.ndarray]:
    """Files of images -> pixel values, (b, c, h, w) float32, by the processor in `folder`.

    That is the layout which stock Flax classes take. Raises `CalibrationError` if Pillow is not
    installed or the folder has no processor; what is given back, for a file that is no image.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError(
            "images are read through Pillow",
            seen="Pillow is not installed",
            mend="pip install pillow, or pass an .npz of pixel_values",
        ) from error
    from transformers import AutoImageProcessor

    try:
        # The fast ones need torchvision, and give torch tensors only.
        processor: Any = AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=False
        )
    except Exception as error:  # transformers raises whatever the missing file leads to
        raise CalibrationError(
            "the model's folder has no image processor that can be loaded",
            path=str(folder),
            seen=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="a preprocessor_config.json",
            mend="save the processor into the folder, or pass an .npz of pixel_values",
        ) from error

    def one(path: Path) -> Any:
        try:
            with Image.open(path) as image:
                if (pixels := math.prod(image.size)) > _MOST_PIXELS:
                    raise ValueError(f"{pixels:,} pixels, where {_MOST_PIXELS:,} are the most")
                return image.convert(_MODES.get(channels, "RGB"))
        # Pillow raises OSError, SyntaxError, ValueError and its own, as the format has it.
        except Exception as error:
            raise CalibrationError(
                "an image cannot be read",
                path=str(path),
                seen=error,
                mend="remove it from the folder, or save it anew",
            ) from error

    def read(paths: Sequence[Path]) -> np.ndarray:
        try:
            out = processor(images=[one(path) for path in paths], return_tensors="np")
            return np.asarray(out["pixel_values"], np.float32)
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(
                "the image processor makes no pixel values of one shape",
                path=str(folder),
                seen=str(error).splitlines()[0] if str(error) else type(error).__name__,
                mend="pass an .npz of pixel_values, (samples, channels, height, width)",
            ) from error

    return read
