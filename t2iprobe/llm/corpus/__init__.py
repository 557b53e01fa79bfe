"""Prompt and caption corpora: annotate everything, delete nothing, filter by recipe, show what filters do."""
