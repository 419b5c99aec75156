"""What a run writes while it goes: metrics and samples."""
