"""The vocabulary of recipes: score, select, merge and budget functions, 5-20 lines of PyTorch each."""
