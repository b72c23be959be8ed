"""What the three BDD100K scripts share. See CONTRIBUTING.md for the map of folders."""

import importlib.util as _util
import pathlib as _pathlib

__version__ = "0.2.0"

# The public segment-anything has a package of the same name, and outside of this folder Python may find that one first.
_here = _pathlib.Path(__file__).resolve().parents[1]
_spec = _util.find_spec("segment_anything")
_found = _pathlib.Path(_spec.origin).resolve().parent if _spec and _spec.origin else None
if _found != _here / "segment_anything":
    raise ImportError(
        f"two packages are named segment_anything: {_here / 'segment_anything'}, which is needed here, and {_found}, "
        f"which Python finds first; set PYTHONPATH={_here}, or pip uninstall segment-anything",
        name=__name__,
    )
