"""Hugging Face folders: import, export, and the modelling file that ships with an export."""

from intttrain.interop.export import ExportResult, export_model
from intttrain.interop.importer import load_hf_folder

__all__ = ["ExportResult", "export_model", "load_hf_folder"]
