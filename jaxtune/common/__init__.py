"""What knows neither arrays nor recipes: the console, files, errors, names that people give."""
