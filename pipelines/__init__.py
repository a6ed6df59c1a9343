"""Everything that touches files, clusters and people: corpora, training, tokenizing, the command line."""
