"""The one exception that means 'the input is wrong', as opposed to 'the program is wrong'."""


class InputError(ValueError):
    """Bad input from outside: one line that names the field or file and the remedy. Exits with 2."""
