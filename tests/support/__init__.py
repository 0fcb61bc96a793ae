"""What tests share: small runs, planted models, stand-ins, bad input."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
