"""What `mosel demo` does: choose the settings, send real items, and summarise what came back."""
