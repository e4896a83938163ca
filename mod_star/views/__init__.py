"""Everything that draws: tables, coloured text, progress bars, pictures. Imports no JAX."""
