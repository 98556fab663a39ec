"""Results as people read them: tables, figures, files and pages."""
