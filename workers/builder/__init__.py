"""The build lane: sees that the engine cache has the engines of every installed model, so that no worker builds."""
