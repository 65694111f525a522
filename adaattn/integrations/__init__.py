"""Attention for other libraries; each module imports its library, and nothing here is imported unasked."""
