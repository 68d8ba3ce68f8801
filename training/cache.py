"""Decoded images of a folder, kept for the next run: reading 60,000 files takes longer than training on them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.contract import METADATA_KEY, InputSpec
from training.files import remove_leftovers, replacing

FOLDER = ".decoded"
"""Below a recipe's `data_dir`. It can be deleted at any time."""
DECODING = 1
"""Raised with every change of `model/images.py` that gives other pixels."""


class Decoded(NamedTuple):
    """Images, uint8 (M, height, width, channels), and the digest of these and their labels."""

    images: Tensor
    digest: str


class DecodedCache:
    """One file of decoded images for one folder and input size, which is replaced when any of its files changes.

    Args:
        data_dir: where the cache lies.
        root: the folder of images.
        paths: of the images, in order.
        spec: size, channels and resizing of the decoded images.
    """

    def __init__(self, data_dir: Path, root: Path, paths: Sequence[Path], spec: InputSpec) -> None:
        form = spec.model_dump(mode="json", exclude={"mean", "std"})
        name = json.dumps([DECODING, str(root.resolve()), form], sort_keys=True)
        self.path = data_dir / FOLDER / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
        self._root, self._paths = root, paths

    def load(self) -> Decoded | None:
        """What was decoded of these very files; None where nothing was.

        A file counts as the same if its name, size and time of change are.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                known = json.loads((file.metadata() or {})[METADATA_KEY])
                if known["files"] == self._files():
                    return Decoded(file.get_tensor("images"), known["digest"])
        except (SafetensorError, OSError, KeyError, ValueError):
            pass  # not there, or damaged: it will be written anew
        return None

    def save(self, decoded: Decoded) -> None:
        """Keep decoded images; where there is no room for them, say so and go on."""
        metadata = {METADATA_KEY: json.dumps({"files": self._files(), "digest": decoded.digest}, sort_keys=True)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)  # each may be as large as the set
            with replacing(self.path) as temporary:
                save_file({"images": decoded.images}, temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            print(f"note: the decoded images could not be kept in {self.path.parent} ({error}).")

    def _files(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            state = path.stat()
            digest.update(f"{path.relative_to(self._root)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        return digest.hexdigest()
