"""What can be done with the models of each library: tiny ones of every class, tried."""
