"""One file a task: recipe in, result out."""
