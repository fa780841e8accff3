"""One file per connection to the outside. Importing a module opens no connection."""
