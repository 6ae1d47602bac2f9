"""Model files: what comes in is recognised and read without running it; what goes out is written whole or not at all."""

from normrewrite.files.layout import Layout, NoSuchKey
from normrewrite.files.outputs import check_outputs, check_writable, write_atomically
from normrewrite.files.reading import Content, ModelFile, load, look, read, recognise, record
from normrewrite.files.writing import Form, save, with_manifest, write_tensors

__all__ = [
    "Content",
    "Form",
    "Layout",
    "ModelFile",
    "NoSuchKey",
    "check_outputs",
    "check_writable",
    "load",
    "look",
    "read",
    "recognise",
    "record",
    "save",
    "with_manifest",
    "write_atomically",
    "write_tensors",
]
