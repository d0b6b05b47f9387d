"""Launch configurations: data and one pure function a family. Nothing is measured on a user's call."""
