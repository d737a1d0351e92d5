"""Files that appear whole, images and plots for people, messages and progress."""
