"""Bytes and what they promise: formats, codecs, stores, integrity."""
