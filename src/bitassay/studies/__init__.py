"""Jobs that combine the rooms above: the assay, checkpoints, experiments with their claims."""
