"""This library inside other libraries' trainers; each module imports the library that it is for."""
