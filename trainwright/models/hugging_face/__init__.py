"""Any architecture of transformers as a family: its own modules, held, divided and saved as native ones are."""
