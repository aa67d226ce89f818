"""What a strategy's author needs to test a package: a fake site-packages and a toy target."""
