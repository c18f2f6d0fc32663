"""What a person can ask for, one file each; every verb tells what it does through `listen` and prints nothing."""
