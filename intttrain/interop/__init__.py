"""Hugging Face folders: import, export, and the modelling file that ships with an export."""

from intttrain.interop.export import ExportResult, export_model

__all__ = ["ExportResult", "export_model"]
