"""Worker processes: started, called, ended, and the devices that they get."""
