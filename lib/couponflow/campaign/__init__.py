"""From predictions to an exported audience and its report."""
