"""What a run is turned into: a merged model, an adapter to give away; one file each."""
