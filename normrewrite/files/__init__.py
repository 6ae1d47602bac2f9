"""Model files: what comes in is recognised and read without running it; what goes out is written whole or not at all."""

from normrewrite.files.reading import Content, ModelFile, load, look, read, recognise, record
from normrewrite.files.writing import Form, check_writable, save, write_atomically, write_manifest, write_tensors

__all__ = [
    "Content",
    "Form",
    "ModelFile",
    "check_writable",
    "load",
    "look",
    "read",
    "recognise",
    "record",
    "save",
    "write_atomically",
    "write_manifest",
    "write_tensors",
]
