"""Imported first by the scripts beside it, so that they run from a checkout that is not installed (`pip install -r requirements.txt`)."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
