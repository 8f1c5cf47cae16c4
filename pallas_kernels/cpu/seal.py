"""What ties a compiled library to its sources: two SHA-256 digests at its end, of the sources and of all before.

A loader takes no notice of what ends a file. Standard library alone, because the build runs this too.
"""

import hashlib
import pathlib

FLAGS = (
    *("-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"),
    "-ffp-contract=off",  # bits
    "-fno-wrapv",  # Python's own flags have -fwrapv, with which gcc 12's products of float32 rows take twice as long
)
DIGEST = hashlib.sha256().digest_size


def seal(library: pathlib.Path, sources: pathlib.Path) -> None:
    """Put the seal on a library just built from a folder's sources."""
    content = library.read_bytes() + _of_sources(sources)
    library.write_bytes(content + hashlib.sha256(content).digest())


def is_whole(library: pathlib.Path) -> bool:
    """Whether the file ends in a seal, and no byte before it changed."""
    content = library.read_bytes()
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def is_of(library: pathlib.Path, sources: pathlib.Path) -> bool:
    """Whether a sealed library was built from the folder's sources as they are now."""
    return library.read_bytes()[-2 * DIGEST : -DIGEST] == _of_sources(sources)


def _of_sources(folder: pathlib.Path) -> bytes:
    """The digest of all C++ files, and of how they are compiled."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted([*folder.glob("*.cc"), *folder.glob("*.h")]):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.digest()
