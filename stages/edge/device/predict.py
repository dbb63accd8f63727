"""Classify images and print one line for each, with the time it took.

    python predict.py image.jpg [more...]

The script answers only if the top softmax confidence reaches the threshold in `bundle.json`; otherwise it prints
`unsure`. The times are those of a warm model; bench.py also measures the start-up. The exit code is 1 if an image
could not be read; the script still classifies the others.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

try:
    import numpy as np
    from edgewise_decode import decode
    from edgewise_model import Model, open_model, reason_of, run_script, threads_argument
    from PIL import Image
except ImportError as missing:
    own = str(missing.name).startswith("edgewise_")
    sys.exit(f"error: {missing}: {'copy the whole bundle again' if own else 'pip install -r requirements.txt'}")


def answer_line(model: Model, path: Path) -> str:
    """Raises the exceptions of Pillow if the file is broken or not an image."""
    started = time.perf_counter_ns()
    bundle = model.bundle
    pixels, _ = decode(path, bundle.image_size, bundle.geometry, bundle.channels, bundle.levels)
    preprocess_ms = (time.perf_counter_ns() - started) / 1e6
    answer = model.answer(pixels)
    return f"{path}: {answer}, {preprocess_ms:.2f} ms preprocess, {answer.inference_ms:.2f} ms inference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="image")
    parser.add_argument("--threads", type=threads_argument, default=1, help="threads of ONNX Runtime (default: 1)")
    arguments = parser.parse_args()
    model = open_model(Path(__file__).parent, arguments.threads)
    model.answer(np.zeros(model.image_shape, np.uint8))  # the first inference is slower
    Image.preinit()  # so is the first image, because Pillow then loads its formats
    warnings.simplefilter("ignore")  # warnings of Pillow about large or unusual images
    failed = False
    for path in arguments.images:
        try:
            line = answer_line(model, path)
        except Exception as error:  # errors of Pillow have no common class
            print(f"{path}: cannot read it: {reason_of(error, path)}", file=sys.stderr)
            failed = True
            continue
        print(line, flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    run_script(main)
